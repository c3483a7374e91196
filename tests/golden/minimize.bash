# systemvm
MINIMIZE=yes
JRE=default-jre-headless
DESKTOP='libx11-6|libxcb1|libxext6|libxtst6|x11-common|xserver-.*|libgtk-?[234].*|libqt[456].*|libwayland-.*|libgl1.*|libegl1.*|libpulse0|.*-desktop'
# tiny
JRE=
# i386
MINIMIZE=
JRE=
# uefi
JRE=
