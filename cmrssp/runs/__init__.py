"""The run folder and its life: progress, saving, resuming."""
