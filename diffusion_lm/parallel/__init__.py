"""The device mesh, logical axis rules, shardings, and runs with several processes."""
