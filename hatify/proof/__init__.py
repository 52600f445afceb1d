"""What the proof is made of: inputs, keeping a model as it was, parity, drift, and gradients; see ``hatify/verification.py``."""
