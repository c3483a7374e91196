# systemvm
PASSWORD=password-hash
# tiny
PASSWORD=password-hash
# i386
PASSWORD=password-hash
# uefi
PASSWORD=password-hash
