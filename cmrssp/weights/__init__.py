"""Checkpoints, what transfers from them, and exchange with nnU-Net v2."""
