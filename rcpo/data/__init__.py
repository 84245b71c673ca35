"""From files and tasks to token batches: read, split, tokenise, store, collate.

Importing the package imports neither torch nor transformers; `rcpo.data.collate` needs torch.
"""
