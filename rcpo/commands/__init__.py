"""The commands of `rcpo`, a module each."""
