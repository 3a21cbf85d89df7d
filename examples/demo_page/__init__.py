"""The page of `demo_app.py`: recordings, their units as HTML, comparisons."""
