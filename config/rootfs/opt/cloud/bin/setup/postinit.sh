#!/bin/sh
# Entry point of cloud-postinit.service, under the name that a management server's own scripts replace.
exec /usr/local/sbin/systemvm postinit
