"""Floor 1: the device mesh, logical axis rules, shardings and several hosts."""
