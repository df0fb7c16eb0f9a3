"""Files on this machine, opened safely: mapped, indexed, and written complete or not at all."""
