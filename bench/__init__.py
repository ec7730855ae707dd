"""How fast the hot paths are, beside the machine's own limits and beside other tools, in one run."""
