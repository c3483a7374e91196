"""Debian from outside: mirrors, signed releases, packages of this host."""
