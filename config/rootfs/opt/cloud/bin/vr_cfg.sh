#!/bin/sh
# A management server leaves a batch of documents and has it merged: `vr_cfg.sh -c FILE`.
exec /usr/local/sbin/systemvm batch "$2"
