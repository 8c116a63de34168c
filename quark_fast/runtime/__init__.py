"""The machine and the run: precision, memory, processes, the run folder."""
