note "this image has no keepalived"
