# systemvm
DRIVERS=(
    virtio_pci
    virtio_mmio
    virtio_blk
    virtio_scsi
    virtio_net
    virtio_console
    xen-blkfront
    xen-netfront
    xen-scsifront
    vmw_pvscsi
    mptspi
    mptsas
    BusLogic
    vmxnet3
    hv_vmbus
    hv_storvsc
    hv_netvsc
    hyperv-keyboard
    ahci
    ata_piix
    ata_generic
    sym53c8xx
    nvme
    e1000
    e1000e
    8139cp
    8139too
    pcnet32
    ne2k-pci
    sd_mod
    sr_mod
    ext4
    crc32c_generic
)
PACKAGE=linux-image-amd64
# tiny
# i386
PACKAGE=linux-image-686-pae
# uefi
