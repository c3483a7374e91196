# systemvm
PASSWORD=password-hash
# tiny
# i386
# uefi
