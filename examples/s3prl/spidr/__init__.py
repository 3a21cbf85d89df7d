"""SpidR and DinoSR as an upstream of s3prl, for SUPERB (see hubconf.py)."""
