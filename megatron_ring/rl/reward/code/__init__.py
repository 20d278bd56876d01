"""The verifier of code problems. The files in ``inside`` run in the sandbox."""
