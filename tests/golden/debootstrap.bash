# systemvm
SUITE=bookworm
ARCH=amd64
TOOL=mmdebstrap
ARCHS=(amd64)
EXACTLY=(tool:amd64=1:1+b2)
LINKS='bin sbin lib lib64'
TOTAL=1
REFUSED=10
# tiny
SUITE=bookworm
ARCH=amd64
TOOL=mmdebstrap
ARCHS=(amd64)
EXACTLY=(tool:amd64=1:1+b2)
LINKS='bin sbin lib lib64'
TOTAL=1
REFUSED=10
# i386
SUITE=bookworm
ARCH=i386
TOOL=debootstrap
ARCHS=(i386)
EXACTLY=(tool:i386=1:1+b2)
LINKS='bin sbin lib'
TOTAL=1
REFUSED=10
# uefi
SUITE=bookworm
ARCH=amd64
TOOL=mmdebstrap
ARCHS=(amd64)
EXACTLY=(tool:amd64=1:1+b2)
LINKS='bin sbin lib lib64'
TOTAL=1
REFUSED=10
