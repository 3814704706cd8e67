"""F-SAM inside the frameworks that people train with; importing fsam_ext imports none of these, nor any framework."""
