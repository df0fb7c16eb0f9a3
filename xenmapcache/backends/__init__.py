"""Sources of guest memory, one file for each name of :func:`xenmapcache.open_backend`.

========  =================  ====  ==================  =====================================
name      class              kind  capabilities        what it reads
========  =================  ====  ==================  =====================================
xen       XenBackend         live  WRITE REMAP DIRTY   a guest, through libxenforeignmemory
xenctrl   XenControlBackend  live  WRITE DIRTY         a guest, through libxenctrl
mock      MockBackend        live  WRITE REMAP DIRTY   a guest of :mod:`xenmapcache.mock`
coredump  CoredumpBackend    file  NONE                files of ``xl dump-core``
elfcore   ElfCoreBackend     file  NONE                ELF cores of kdump and QEMU
kdump     KdumpBackend       file  NONE                makedumpfile's compressed format
raw       RawBackend         file  NONE                flat images, and LiME files
save      SaveBackend        file  NONE                files of ``xl save``
========  =================  ====  ==================  =====================================

A live backend has REMAP and DIRTY only if Xen's libraries on this machine offer them.
``domain.py`` has what the backends of live guests share, ``image.py`` what those of files share.
"""
