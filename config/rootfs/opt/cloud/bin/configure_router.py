#!/usr/bin/python3
"""keepalived tells the router its new state: --primary, --backup or --fault."""

import os
import sys

os.execv("/usr/local/sbin/systemvm", ["systemvm", *(word.removeprefix("--") for word in sys.argv[1:])])
