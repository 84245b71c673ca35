"""From a validated configuration to processes that train: this one, several, or an outer launcher's.

`python -m rcpo.launch RUN_DIR` trains what RUN_DIR/config.yaml says; it is what local ranks and the jobs of a
multirun are. torch is imported when a process is about to compute, not before.
"""
