"""reasoning-gym's problems: bounded readings of their answers, which evaluate nothing."""
