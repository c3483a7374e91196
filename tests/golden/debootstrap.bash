# systemvm
SUITE=bookworm
ARCH=amd64
TOOL=builtin
ARCHS=(amd64)
EXACTLY=(tool:amd64=1:1+b2)
LINKS='bin sbin lib lib64'
DEFERRED=(py3compile depmod systemd-hwdb)
WARMED=(deb-systemd-helper addgroup adduser a2enconf a2enmod update-rc.d)
MODULES=(
    Cwd
    Data::Dumper
    File::Basename
    File::Path
    File::Spec
    File::Temp
    Getopt::Long
    I18N::Langinfo
    POSIX
    Debconf::AutoSelect
    Debconf::ConfModule
    Debconf::Db
    Debconf::DbDriver::Cache
    Debconf::DbDriver::File
    Debconf::DbDriver::Stack
    Debconf::Format::822
    Debconf::FrontEnd::Noninteractive
    Debconf::Log
    Debconf::Template
)
TOTAL=1
REFUSED=10
# tiny
# i386
ARCH=i386
TOOL=debootstrap
ARCHS=(i386)
EXACTLY=(tool:i386=1:1+b2)
LINKS='bin sbin lib'
# uefi
