"""The DeepSpeed engine, its partitions, and the models that are loaded into it."""
