"""Every parallel layout against the single-device reference model."""
