"""Log-probs of a frozen reference: the rows of a batch (`rows`), and their cache on disk.

`keys` says what an entry of the cache depends on, `entry` is its file, `cache` finds or fills it.
"""
