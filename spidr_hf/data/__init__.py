"""Audio in: manifests, folders, tars and data sets, streams, batches of like length, masks, alignments and labels.

Decoding happens in the workers of a data loader; what they yield is ready for a model.
"""
