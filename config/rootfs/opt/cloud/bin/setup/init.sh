#!/bin/sh
# Entry point of cloud-preinit.service, under the name that a management server's own scripts replace.
exec /usr/local/sbin/systemvm preinit
