#!/bin/sh
# A management server asks for the state of a redundant router: one line, `Status: X`.
exec /usr/local/sbin/systemvm check-router
