"""The pytest plugin, as a project sees it that has xenmapcache installed."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of its own, as strict as can be."""
    pytester.makeini(
        "[pytest]\naddopts = --strict-markers --strict-config\nfilterwarnings = error\n"
    )
    return pytester


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    # Not in this process: it has imported what a project without it must not import.
    plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # which starts twice as fast
    return project.runpytest_subprocess(*plain, *options, timeout=60)


def test_fixtures_are_there_without_an_import(project: pytest.Pytester) -> None:
    """The entry point brings the plugin, and the three fixtures belong together."""
    project.makepyfile(
        """
        import sys

        def test_found(request):
            plugin = request.config.pluginmanager.get_plugin("xenmapcache")
            assert plugin is sys.modules["pytest_xenmapcache"]

        def test_together(mock_hypervisor, mock_domain, map_cache):
            assert list(mock_hypervisor.domains.values()) == [mock_domain]
            mock_domain.write(0x1000, b"hello")
            assert map_cache.read(0x1000, 5) == b"hello"
            assert mock_domain.memory_end == 64 << 20

        def test_a_guest_for_each_test(mock_domain, map_cache):
            assert map_cache.read(0x1000, 5) == bytes(5)
        """
    )
    run(project).assert_outcomes(passed=3)


def test_nothing_is_imported_where_it_is_not_used(project: pytest.Pytester) -> None:
    """A project that merely has xenmapcache installed does not even import the package."""
    project.makepyfile(
        """
        import sys

        def test_unused():
            assert "pytest_xenmapcache" in sys.modules
            assert not [name for name in sys.modules if name.partition(".")[0] == "xenmapcache"]
        """
    )
    run(project).assert_outcomes(passed=1)


def test_it_can_be_left_out(project: pytest.Pytester) -> None:
    """-p no:xenmapcache takes fixtures and markers away."""
    project.makepyfile(
        """
        def test_without(request):
            assert not request.config.pluginmanager.has_plugin("xenmapcache")
        """
    )
    run(project, "-p", "no:xenmapcache").assert_outcomes(passed=1)


def test_options_come_through_markers(project: pytest.Pytester) -> None:
    """Options of domain and cache; those of module and test add up, the nearest wins."""
    project.makepyfile(
        """
        import pytest
        from xenmapcache import FaultError

        pytestmark = pytest.mark.mock_domain(memory="16M", vcpus=2)

        @pytest.mark.mock_domain(memory="8M", holes=[(0xA0000, 0x20000)])
        @pytest.mark.map_cache(bucket_shift=12, on_stale="copy")
        def test_options(mock_domain, map_cache):
            assert (mock_domain.memory_end, mock_domain.vcpus) == (8 << 20, 2)
            map_cache.read(0x1000, 1)
            assert map_cache.stats().resident_bytes == 4096
            with pytest.raises(FaultError):
                map_cache.read(0xA0000, 1)
            with map_cache.map_dma(0x3000, 8, owner="disk0") as lease:
                mock_domain.balloon_out(0x3000, 0x1000)
                mock_domain.balloon_in(0x3000, 0x1000)
                lease.view[:] = b"survived"
            assert mock_domain.read(0x3000, 8) == b"survived"

        @pytest.mark.mock_domain("8M")
        def test_positional(mock_domain):
            pass
        """
    )
    result = run(project)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*the marker mock_domain takes keyword arguments, not ('8M',)"])
    run(project, "--markers").stdout.fnmatch_lines(
        [f"@pytest.mark.{name}(*): *" for name in ("mock_domain", "map_cache", "ioreq_server")]
    )


def test_a_project_has_a_domain_of_its_own(project: pytest.Pytester) -> None:
    """mock_domain can be overridden, even with one for all tests, and map_cache follows it."""
    project.makeconftest(
        """
        import pytest
        from xenmapcache import MockHypervisor

        @pytest.fixture(scope="session")
        def mock_domain():
            return MockHypervisor().create_domain(memory="4M")
        """
    )
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("turn", [1, 2])
        def test_shared(map_cache, mock_domain, turn):
            assert map_cache.memory_end == 4 << 20
            mock_domain.balloon_out(turn << 12, 0x1000)
            assert map_cache.stats().invalidations == 1
            assert mock_domain.invalidations == turn
        """
    )
    run(project).assert_outcomes(passed=2)


def test_the_domain_invalidates_the_cache(project: pytest.Pytester) -> None:
    """By itself; where an ioreq server is open, that one does it, its callbacks first."""
    project.makepyfile(
        """
        from xenmapcache.devicemodel import IoreqServer

        def test_alone(mock_domain, map_cache):
            mock_domain.balloon_out(0, 0x1000)
            assert map_cache.stats().invalidations == 1

        def test_with_a_server(mock_domain, map_cache):
            server = IoreqServer(mock_domain, map_cache)
            leases, stale = [], []

            @server.on_quiesce
            def finish():
                while leases:
                    stale.append(leases[-1].stale)
                    leases.pop().release()

            with server, server.serving():
                leases.append(map_cache.map_dma(0x1000, 8, owner="disk0"))
                mock_domain.balloon_out(0, 0x1000)
            assert stale == [False]
            assert map_cache.stats().invalidations == 2  # one when it was opened
            assert map_cache.stats().stale_dma_released == 0
        """
    )
    run(project).assert_outcomes(passed=2)


def test_a_forgotten_lease_is_an_error_with_its_name(project: pytest.Pytester) -> None:
    """The test that forgot it is told the owner; the next one starts afresh."""
    project.makepyfile(
        """
        def test_forgets(map_cache):
            map_cache.map_dma(0x1000, 512, owner="disk0")
            map_cache.map_device(0x5000, 512, owner="vga")

        def test_releases(map_cache):
            map_cache.map_dma(0x1000, 512, owner="disk1").release()
        """
    )
    result = run(project)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_forgets*",
            "leases are held at the end of the test:",
            "  DMA lease of 'disk0': address 0x1000, *, thread 'MainThread', taken at *.py:2 in *",
            "  DEVICE lease of 'vga': address 0x5000, *.py:3 in test_forgets",
        ]
    )
    result.stdout.no_fnmatch_line("*disk1*")


def test_a_test_that_failed_is_reported_once(project: pytest.Pytester) -> None:
    """Its leases are not a second error; nor are those of a test that was expected to fail."""
    project.makepyfile(
        """
        import unittest

        import pytest

        def test_fails(map_cache):
            map_cache.map_dma(0x1000, 512, owner="disk0")
            assert False

        class TestCase(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def take(self, map_cache):
                self.cache = map_cache

            def test_fails_as_unittest_has_it(self):
                self.cache.map_dma(0x1000, 512, owner="disk0")
                self.fail()

        @pytest.mark.xfail(strict=True)
        def test_is_known_to_fail(map_cache):
            map_cache.map_dma(0x1000, 512, owner="disk0")
            assert False
        """
    )
    run(project).assert_outcomes(failed=2, xfailed=1)


def test_a_server_serves_while_the_test_runs(project: pytest.Pytester) -> None:
    """With options of a marker; a PCI guest finds what the test has claimed."""
    project.makepyfile(
        """
        import pytest

        class Device:
            def read(self, offset, size):
                return 0x10011AF4 >> 8 * offset & (1 << 8 * size) - 1 if offset < 4 else 0

        @pytest.mark.mock_domain(memory="1M", holes=[(0xA0000, 0x20000)])
        @pytest.mark.ioreq_server(buffered=True)
        def test_served(mock_domain, map_cache, ioreq_server):
            written = []
            ioreq_server.claim_mmio(0xA0000, 4).write(lambda *access: written.append(access))
            mock_domain.mmio_write(0xA0000, 5, 1, buffered=True)
            ioreq_server.claim_ports(0x510, 4, Device())
            assert mock_domain.port_in(0x510) == 0x10011AF4
            assert written == [(0, 1, 5)]
            assert ioreq_server.cache is map_cache

        def test_found(pci_guest, mock_domain, ioreq_server):
            assert pci_guest.scan() == []
            ioreq_server.claim_pci("00:05.0", Device())
            (device,) = pci_guest.scan()
            assert (device.vendor_id, device.device_id) == (0x1AF4, 0x1001)
            assert pci_guest.domain is mock_domain
        """
    )
    run(project).assert_outcomes(passed=2)


def test_what_the_guests_code_raises_fails_the_test(project: pytest.Pytester) -> None:
    """With a server, which serves the code until it has ended, and without."""
    project.makepyfile(
        """
        def test_alone(mock_domain):
            mock_domain.spawn(0, int, "no number")

        def test_with_a_server(mock_domain, ioreq_server):
            values = iter([1])
            ioreq_server.claim_ports(0x510, 4).read(lambda offset, size: next(values))

            def code():
                assert mock_domain.port_in(0x510) == 2, "wrong value"

            mock_domain.spawn(0, code)

        def test_passed_on(mock_domain):
            try:
                mock_domain.spawn(0, int, "no number").result()
            except ValueError:
                pass
        """
    )
    result = run(project)
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*ValueError: invalid literal*", "*AssertionError: wrong value"])
