#!/usr/bin/python3
"""A management server leaves a document in /var/cache/cloud and has it merged by its name."""

import os
import sys

os.execv("/usr/local/sbin/systemvm", ["systemvm", "update-config", *sys.argv[1:]])
