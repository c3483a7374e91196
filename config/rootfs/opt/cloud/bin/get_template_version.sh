#!/bin/sh
# A management server asks which template and which scripts this is: `<release>&<signature>`.
exec /usr/local/sbin/systemvm template-version
