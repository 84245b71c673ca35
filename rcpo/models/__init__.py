"""Language models of transformers: found, loaded, adapted, and scored as a policy."""
