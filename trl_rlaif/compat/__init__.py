"""Everything that depends on the installed version of TRL."""
