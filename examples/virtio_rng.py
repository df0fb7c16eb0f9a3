"""Random numbers for a guest's own driver: virtio-rng, over each of the two transports.

A PVH guest finds it on a PCI bus. An HVM guest finds it there, too, or at an address that its ACPI
tables name: that is virtio-mmio. The driver of the mock plays the guest's kernel.
"""

from functools import partial

from xenmapcache import MapCache, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer, PciBus
from xenmapcache.devicemodel.virtio import VirtioMmio, VirtioPci, VirtioRng
from xenmapcache.mock.pci_driver import PciDriver
from xenmapcache.mock.virtio_driver import VirtioDriver

BDF = "0000:00:01.0"
ADDRESS, IRQ = 0xFE00_0000, 7


def draw(driver: VirtioDriver) -> None:
    """Have a guest's driver ask for random numbers."""
    driver.start()
    queue = driver.queues[0]
    seen = set()
    for length in (16, 32, 64, 8192):
        chain = queue.add(writable=[length])
        queue.kick()
        chain = queue.wait(chain)
        seen.add(chain.data)
        print(f"  asked for {length} bytes, got {chain.written}")
    print(f"  different each time: {len(seen) == 4}")


def over_pci() -> None:
    """Serve a PVH guest."""
    guest = MockHypervisor().create_domain(memory="16M", type="pvh")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with VirtioRng(server) as rng:
            PciBus(server).plug()
            VirtioPci(server, BDF, rng).plug()
            with server, server.serving():
                print("virtio-pci, with MSI-X:")
                draw(VirtioDriver.over_pci(PciDriver(guest).find(BDF)))


def over_mmio() -> None:
    """Serve an HVM guest."""
    guest = MockHypervisor().create_domain(memory="16M")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with VirtioRng(server) as rng:
            VirtioMmio(server, ADDRESS, rng, interrupt=partial(server.set_isa_irq, IRQ))
            with server, server.serving():
                print("virtio-mmio, with an interrupt line:")
                draw(VirtioDriver.over_mmio(guest, ADDRESS, IRQ))


if __name__ == "__main__":
    over_pci()
    over_mmio()
