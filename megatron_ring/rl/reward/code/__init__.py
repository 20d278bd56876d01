"""Code: a problem's forms, the block that is the solution, programs, comparison; ``inside`` runs in the sandbox."""
