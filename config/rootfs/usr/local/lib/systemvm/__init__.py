"""The guest's side of CloudStack: from the boot line to a configured system VM.

    hypervisor  which one is this?             facts in, name out
    transport   where does the boot line come from, per hypervisor
    boot_line   text to parameters; typed access that refuses what is not what it says
    roles       what each type of system VM is, as a table
    setup       parameters and facts to files, services and commands: pure
    redundancy  a redundant pair: keepalived, conntrackd, heartbeat, state
    patch       scripts that a management server brought
    machine     the only module that touches this machine
    main        the verbs

CloudStack needs it because a system VM is configured by nothing but its boot line until the management
server reaches it over SSH. Standard library, and Jinja2 for keepalived.conf.
"""
