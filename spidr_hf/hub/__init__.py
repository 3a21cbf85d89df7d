"""What a folder on the Hub holds beside weights and code: the model card."""
