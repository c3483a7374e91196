"""Every source of settings, its precedence, and what each mistake is answered with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build.engine import references, settings, sources
from build.engine.errors import BuildError
from build.engine.settings import KERNELS, Loaded, Settings

CHECKOUT = Path(__file__).resolve().parents[2]

Load = Callable[..., Loaded]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load settings from the text of an image definition and of `.env`, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def call(
        yaml: str = "",
        *overrides: str,
        environ: Mapping[str, str] | None = None,
        dotenv: str | bytes | None = None,
        password: str | None = None,
    ) -> Loaded:
        Path("image.yaml").write_text(yaml, encoding="utf-8")
        if dotenv is not None:
            Path(".env").write_bytes(dotenv if isinstance(dotenv, bytes) else dotenv.encode())
        return settings.load(Path("image.yaml"), environ or {}, Path(".env"), overrides, password)

    return call


def refused(load: Load, *arguments: Any, **options: Any) -> str:
    """Load what must be refused, with a hint."""
    with pytest.raises(BuildError) as caught:
        load(*arguments, **options)
    assert caught.value.hint
    # One line for each mistake, none of which is pydantic's own words.
    assert all(line.startswith("       ") for line in caught.value.what.split("\n")[1:])
    assert not re.search(r"Input should|valid (tuple|list|dict)", caught.value.what)
    return f"{caught.value.what} | {caught.value.hint}"


def test_a_schema_is_no_setting_and_every_successor_is_a_key(load: Load) -> None:
    assert load("schema: 1\nsize: 100").settings == load("size: 100").settings
    assert "schema" not in load("schema: 1").origins
    assert set(sources.SUCCESSORS.values()) <= Settings.model_fields.keys()
    assert not sources.SUCCESSORS.keys() & Settings.model_fields.keys()


def test_the_defaults_are_the_documented_ones(load: Load) -> None:
    loaded = load()
    assert set(loaded.origins.values()) == {"default"}
    given = loaded.settings
    assert (given.imagename, given.hostname, given.size, given.minimize) == (
        "systemvm",
        "systemvm",
        2000,
        True,
    )
    assert (given.suite, given.arch, given.bootstrap) == ("bookworm", "amd64", "builtin")
    empty = (given.location, given.mountpoint, given.imageloc, given.apt_proxy, given.debian_mirror)
    assert empty == ("",) * 5
    assert given.cloudstack_release == ""
    assert given.password.get_secret_value() == ""


def test_each_source_beats_the_one_below_it_and_is_named(load: Load) -> None:
    yaml = "imagename: a\nhostname: a\nsize: 100\nsuite: bookworm\n"
    loaded = load(
        yaml,
        "hostname=flag",
        environ={"SYSTEMVM_HOSTNAME": "env", "SYSTEMVM_SIZE": "300", "HOSTNAME": "container"},
        dotenv="SYSTEMVM_HOSTNAME=file\nSYSTEMVM_SIZE=200\nSYSTEMVM_SUITE=trixie\n",
    )
    given = loaded.settings
    assert (given.imagename, given.suite, given.size, given.hostname) == ("a", "trixie", 300, "flag")
    shown = [loaded.origins[key] for key in ("imagename", "suite", "size", "hostname", "arch")]
    assert shown == ["image.yaml:1", ".env:3", "environment SYSTEMVM_SIZE", "--set hostname", "default"]


@pytest.mark.parametrize(("asked", "got"), [(2000, 2000), (2001, 2002), (64, 64), (2088959, 2088960)])
def test_size_is_made_even(load: Load, asked: int, got: int) -> None:
    assert load(f"size: {asked}").settings.size == got


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("hostnam: x", "image.yaml:1: unknown key 'hostnam' | did you mean 'hostname'?"),
        (
            "size: 1\n\nvrrp:\n  advert: 2\n",
            "image.yaml:4: unknown key 'vrrp.advert' | did you mean 'advert_int'?",
        ),
        ("size: {mib: 3}", "image.yaml:1: 'size' holds one value, no keys"),
        ("schema: 1\nrelease: trixie", "image.yaml:2: unknown key 'release' | it is called 'suite' here"),
        ("schema: 2", "image.yaml:1: schema 2 is newer than this checkout, which knows 1 | update"),
        ("schema: true", "image.yaml:1: schema True is no version | write schema: 1"),
        ("schema: 0", "image.yaml:1: schema 0 is no version | write schema: 1"),
        ("vrrp:\n  schema: 1", "image.yaml:2: unknown key 'vrrp.schema'"),
        ("size: 100\nsize: 200", "image.yaml:2: duplicate key 'size'"),
        ("vrrp:\n  priority: 1\n  priority: 2", "image.yaml:3: duplicate key 'priority'"),
        ("- a\n- b", "image.yaml:1: expected keys and values"),
        ("just text", "image.yaml:1: expected keys and values"),
        ("size: 3\na: [1\n", "image.yaml:3: expected ',' or ']'"),
        ("\tsize: 3", "image.yaml:1"),
        ("vrrp: &x\n  auth_pass: *x", "image.yaml"),
        ("password: geheim", "image.yaml:1: a password is not allowed here"),
        ("password_hash: $6$geheim", "image.yaml:1: a password hash is not allowed here"),
        ("size: abc", "image.yaml:1: size: write a whole number"),
        ("size: 1.5", "image.yaml:1: size: write a whole number"),
        ("size: 63", "image.yaml:1: size: use 64 or more (got 63)"),
        ("size: 2088961", "image.yaml:1: size: use 2088960 or less"),
        ("minimize: perhaps", "image.yaml:1: minimize: write true or false"),
        ("suite: sid", "image.yaml:1: suite: use 'bookworm' or 'trixie' (got 'sid')"),
        ("arch: arm64", "image.yaml:1: arch: use 'amd64' or 'i386'"),
        ("bootstrap: cdebootstrap", "image.yaml:1: bootstrap: use 'builtin', 'mmdebstrap' or 'debootstrap'"),
        ("suite: trixie\narch: i386", "trixie has no kernel for i386"),
        ("arch: i386\nfirmware: [uefi]", "i386 boots under BIOS only"),
        ("imagename: a/b", "image.yaml:1: imagename: use letters, digits, dots and dashes"),
        ("imagename: ''", "image.yaml:1: imagename: use letters"),
        ("hostname: '-x'", "image.yaml:1: hostname: use letters"),
        ("hostname: [a]", "image.yaml:1: hostname: write a text"),
        ("hostname: null", "image.yaml:1: hostname: write a text"),
        ("location: images", "image.yaml:1: location: use an absolute path"),
        ("location: /", "image.yaml:1: location: the root directory"),
        ("mountpoint: /a/../b", "image.yaml:1: mountpoint: use an absolute path"),
        ('location: "/a\\nb"', "image.yaml:1: location: a path with a newline"),
        ("mountpoint: '/mnt/a:b'", "image.yaml:1: mountpoint: a path with ':'"),
        ("mountpoint: /mnt/x\nimageloc: /mnt/x/y.img", "imageloc lies below mountpoint"),
        (
            "debian_mirror: mirror.example",
            "image.yaml:1: debian_mirror: use a URL that starts with http:// or",
        ),
        ("debian_mirror: 'http://a b'", "image.yaml:1: debian_mirror: use a URL without blanks"),
        ("debian_mirror: 'http:///debian'", "image.yaml:1: debian_mirror: the URL names no host"),
        ("debian_mirror: 'http://a..b/'", "image.yaml:1: debian_mirror: the URL names no host"),
        ("apt_proxy: 'http://a:70000'", "image.yaml:1: apt_proxy: the URL names no host or no port"),
        ("apt_proxy: 'http://a:0'", "image.yaml:1: apt_proxy: the URL names no host or no port"),
        ("apt_proxy: file:///x", "image.yaml:1: apt_proxy: use a URL that starts with http:// or https://"),
        ("image_mirror: file:///x", "image.yaml:1: image_mirror: use a URL"),
        ("components: []", "image.yaml:1: components: name at least one"),
        ("components: ['main x']", "image.yaml:1: components: 'main x' is not a component"),
        (
            "packages: {sid: [a1]}",
            "image.yaml:1: packages: unknown row 'sid'; known rows: all, bookworm, trixie",
        ),
        ("packages:\n  all: [bash, '-o Dir=x']", "'-o Dir=x' is not a package name"),
        ("packages: [bash]", "image.yaml:1: packages: write keys with their values"),
        ("kernel_cmdline: quiet $(reboot)", "image.yaml:1: kernel_cmdline: quotes, newlines, '$'"),
        (
            "services: {enable: ['--root=/']}",
            "image.yaml:1: services.enable: '--root=/' is not the name of a unit",
        ),
        ("rootfs: [nowhere]", "image.yaml:1: no overlay folder nowhere"),
        ("vrrp: {advert_int: 0}", "vrrp.advert_int: use 1 or more (got 0)"),
        ("vrrp: {advert_int: 1.5}", "vrrp.advert_int: write a whole number (got 1.5)"),
        ("vrrp: {advert_int: 256}", "vrrp.advert_int: use 255 or less (got 256)"),
        ("vrrp: {advert_int: '2'}", "vrrp.advert_int: write a whole number (got '2')"),
        ("vrrp: {priority: 255}", "vrrp.priority: use 254 or less"),
        ("vrrp: {addresses: [10.0.0.300/24]}", "vrrp.addresses: '10.0.0.300/24' does not appear to be"),
        ("vrrp: {state: MASTER}", "vrrp: nopreempt needs state BACKUP"),
        ("vrrp: {enabled: true}", "vrrp: auth_type AH needs auth_pass"),
        ('vrrp: {interface: "eth0\\n}"}', "vrrp.interface: a newline or control character"),
        ("cache_limit: 0", "image.yaml:1: cache_limit: use 1 or more"),
    ],
)
def test_a_mistake_in_the_definition_names_file_line_and_key(load: Load, text: str, origin: str) -> None:
    assert origin in refused(load, text)


def test_an_unreadable_definition_is_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot read image definition nowhere\.yaml: No such file"):
        settings.load(Path("nowhere.yaml"), {})
    with pytest.raises(BuildError, match="Is a directory"):
        settings.load(tmp_path, {})
    Path("latin.yaml").write_bytes("hostname: \u00e4".encode("latin-1"))
    with pytest.raises(BuildError, match="not UTF-8"):
        settings.load(Path("latin.yaml"), {})
    Path("empty.yaml").write_bytes(b"")
    assert settings.load(Path("empty.yaml"), {}).settings == Settings()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size", "--set 'size' has no '='"),
        ("=3", "--set : unknown key ''"),
        ("siz=3", "--set siz: unknown key 'siz' | did you mean 'size'?"),
        ("quux=3", "--set quux: unknown key 'quux' | see them all: inv config"),
        ("size=", "--set size: write a whole number"),
        ("size.x=3", "--set size.x: 'size' holds one value, no keys"),
        ("vrrp.advert=2", "--set vrrp.advert: unknown key 'vrrp.advert' | did you mean 'advert_int'?"),
        ("vrrp.advert_int=1.5", "--set vrrp.advert_int: write a whole number (got '1.5')"),
        ("vrrp={advert: 3}", "--set vrrp: unknown key 'vrrp.advert'"),
        ("vrrp={advert_int: ", "--set vrrp: not YAML"),
        ("vrrp=3", "--set vrrp: write keys with their values"),
        ("packages.all.x=3", "--set packages.all.x: 'packages.all' holds one value, no keys"),
        ("password=geheim", "--set password: a password is not allowed here"),
        ("PASSWORD=geheim", "a password is not allowed here"),
        ("password_hash=$6$geheim", "--set password_hash: a password hash is not allowed here"),
    ],
)
def test_a_mistake_in_a_flag_is_explained(load: Load, override: str, message: str) -> None:
    text = refused(load, "", override)
    assert message in text
    assert "geheim" not in text


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("SIZE=300", "size", 300),
        ("minimize=no", "minimize", False),
        ("minimize=true", "minimize", True),
        ("hostname=no", "hostname", "no"),
        ("hostname=0123", "hostname", "0123"),
        ("jre=4.20", "jre", "4.20"),
        ("cloudstack_release=4.20.0", "cloudstack_release", "4.20.0"),
        ("cloudstack_release=4.22.0.1", "cloudstack_release", "4.22.0.1"),
        ("cloudstack_release=", "cloudstack_release", ""),
        ("kernel_cmdline=a=b, c=d", "kernel_cmdline", "a=b, c=d"),
        ("formats=vhd,ova", "formats", ("vhd", "ova")),
        ("formats=vhd ova", "formats", ("vhd", "ova")),
        ("formats=[vhd, ova]", "formats", ("vhd", "ova")),
        ("formats=", "formats", ()),
        ("packages.trixie=bash,curl", "packages", {"all": ("dash",), "trixie": ("bash", "curl")}),
        ("packages={trixie: [curl]}", "packages", {"trixie": ("curl",)}),
        ("debian_mirror=http://mirror.example/debian/", "debian_mirror", "http://mirror.example/debian"),
        ("location=/srv/images/", "location", "/srv/images"),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_key(load: Load, override: str, key: str, value: Any) -> None:
    assert getattr(load("packages: {all: [dash]}", override).settings, key) == value


@pytest.mark.parametrize("written", ["4.20", "12", "1e3", "0x10", "no", "4.22.0"])
def test_a_text_is_taken_as_it_is_written(load: Load, written: str) -> None:
    assert load(f"jre: {written}").settings.jre == written


@pytest.mark.parametrize(
    "written", ["4.22", "4", "4.22.x", "4.22.0.0.0", "v4.22.0", "4.22.0-SNAPSHOT", "٤.22.0"]
)
def test_what_is_no_release_is_refused(load: Load, written: str) -> None:
    text = refused(load, f"cloudstack_release: '{written}'")
    assert text.startswith(
        "image.yaml:1: cloudstack_release: write a release of CloudStack with three or four numbers"
    )


@pytest.mark.parametrize("written", ["4.19.3", "4.19.3.0", "4.9.0", "3.0.7"])
def test_a_release_whose_scripts_are_python_2_is_refused(load: Load, written: str) -> None:
    text = refused(load, "", f"cloudstack_release={written}")
    assert "its scripts need Python 2, which Debian 12 does not have" in text
    assert "use 4.20.0 or later" in text


OWN = {
    "imagename": "own",
    "location": "/srv/images/",
    "mountpoint": "/mnt/$IMAGENAME/",
    "imageloc": "$LOCATION/${IMAGENAME}.img",
    "keyring": "${SYSTEMVM_LOCATION}/keys/$suite-$ARCH.gpg",
}
"""As scripts have them that a shell reads."""


@pytest.mark.parametrize("source", ["definition", "environment", "dotenv", "flags"])
def test_settings_stand_in_paths_whichever_source_has_them(load: Load, source: str) -> None:
    variables = {f"SYSTEMVM_{name.upper()}": value for name, value in OWN.items()}
    loaded = {
        "definition": lambda: load("".join(f"{name}: {value}\n" for name, value in OWN.items())),
        "environment": lambda: load(environ=variables),
        "dotenv": lambda: load(dotenv="".join(f"{name}={value}\n" for name, value in variables.items())),
        "flags": lambda: load("", *(f"{name}={value}" for name, value in OWN.items())),
    }[source]()
    given = loaded.settings
    assert (given.location, given.mountpoint) == ("/srv/images", "/mnt/own")
    assert (given.imageloc, given.keyring) == ("/srv/images/own.img", "/srv/images/keys/bookworm-amd64.gpg")


def test_a_name_stands_for_the_value_in_force_wherever_that_comes_from(load: Load) -> None:
    dotenv = "SYSTEMVM_LOCATION=/old/\nSYSTEMVM_IMAGELOC=$LOCATION/$IMAGENAME.img\n"
    loaded = load("hostname: h1", "location=/srv/$HOSTNAME", dotenv=dotenv)
    assert loaded.settings.imageloc == "/srv/h1/systemvm.img"
    assert loaded.origins["imageloc"] == ".env:2"
    beside = load("", "location=/srv/x//", "imageloc=$LOCATION.img").settings
    assert (beside.location, beside.imageloc) == ("/srv/x", "/srv/x.img")


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("/srv/a$$b", "/srv/a$b"),
        ("/srv/$$IMAGENAME", "/srv/$IMAGENAME"),
        ("/srv/$$$ARCH", "/srv/$amd64"),
        ("/srv/a$", "/srv/a$"),
        ("/srv/$/$1", "/srv/$/$1"),
        ("/srv/${arch}64/", "/srv/amd6464"),
        ("/srv//images//", "/srv/images"),
        ("//srv", "/srv"),
    ],
)
def test_a_path_is_taken_without_what_does_not_matter(load: Load, written: str, path: str) -> None:
    assert load("", f"location={written}").settings.location == path
    assert load("", f"location={references.literal(path)}").settings.location == path


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("imageloc=$LOCATON/x.img",),
            "--set imageloc: $LOCATON is no setting that can stand in a path | did you mean 'location'?",
        ),
        (
            ("imageloc=/srv/$NAME.img",),
            "$NAME is no setting that can stand in a path | it is called 'imagename'",
        ),
        (
            ("location=${HOME}/images",),
            "--set location: ${HOME} is no setting that can stand in a path | known: arch,",
        ),
        (
            ("location=$PASSWORD",),
            "--set location: $PASSWORD is no setting that can stand in a path | known: ",
        ),
        (("location=/srv/${}",), "--set location: ${} is no setting that can stand in a path"),
        (
            ("imageloc=$LOCATION/$IMAGENAME.img",),
            "--set imageloc: $LOCATION has no value | set location, or write the path out",
        ),
        (("location=/srv/$CLOUDSTACK_RELEASE",), "$CLOUDSTACK_RELEASE has no value | set cloudstack_release"),
        (
            ("location=$LOCATION/x",),
            "--set location: it leads back to itself: location -> location | write one",
        ),
        (
            ("location=$MOUNTPOINT/x", "imageloc=$LOCATION/x", "mountpoint=$IMAGELOC"),
            "leads back to itself: location -> mountpoint -> imageloc -> location | write one of them out",
        ),
        (
            ("location=/srv/$(hostname)",),
            "--set location: '$(' is for a shell | write $NAME of a setting, or $$ for a '$'",
        ),
        (("location=/srv/${IMAGENAME",), "--set location: '${' is for a shell"),
        (("imagename=$HOSTNAME",), "--set imagename: use letters, digits"),
        (("location=$IMAGENAME",), "--set location: use an absolute path"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(load: Load, overrides: tuple[str, ...], told: str) -> None:
    text = refused(load, "", *overrides, environ={"SYSTEMVM_PASSWORD": "geheim"})
    assert told in text
    assert "geheim" not in text


def test_a_name_that_cannot_be_filled_in_says_where_it_stands(load: Load) -> None:
    assert refused(load, "location: /srv\nimageloc: $X/y").startswith("image.yaml:2: imageloc: $X is no")
    assert refused(load, dotenv="SYSTEMVM_IMAGELOC=$X/y").startswith(".env:1: imageloc: $X is no")
    told = refused(load, environ={"SYSTEMVM_IMAGELOC": "$X/y"})
    assert told.startswith("environment SYSTEMVM_IMAGELOC: imageloc: $X is no")


def test_nothing_but_paths_is_filled_in(load: Load) -> None:
    loaded = load("vrrp: {check_script: /opt/$IMAGENAME}", "names.raw=$IMAGENAME.raw")
    assert loaded.settings.vrrp.check_script == "/opt/$IMAGENAME"
    assert loaded.settings.names == {"raw": "$IMAGENAME.raw"}


URLS = ("debian_mirror", "security_mirror", "apt_proxy", "image_mirror", "download_url")


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("deb.example.org/debian", "http://deb.example.org/debian"),
        ("cacher:3142", "http://cacher:3142"),
        ("192.0.2.1", "http://192.0.2.1"),
        ("//deb.example.org/debian/", "http://deb.example.org/debian/"),
        ("https:/deb.example.org/debian", "https://deb.example.org/debian"),
        ("http:deb.example.org", "http://deb.example.org"),
        ("HTTPS://deb.example.org", "https://deb.example.org"),
        ("ftp://deb.example.org/debian", "http://deb.example.org/debian"),
        ("me:secret@deb.example.org/debian", "http://me:secret@deb.example.org/debian"),
    ],
)
def test_a_url_that_lacks_its_beginning_gets_it_in_the_hint(
    load: Load, name: str, written: str, right: str
) -> None:
    text = refused(load, f"{name}: {written}")
    assert text.startswith(f"image.yaml:1: {name}: use a URL that starts with http://")
    assert text.endswith(f" | write {right}")
    assert getattr(load(f"{name}: {right}").settings, name) == right.rstrip("/")


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    "written",
    ["'deb example'", "nas:/srv/debian", "http;//deb.example.org", "http://", "'-'", "host:99999/x"],
)
def test_what_is_near_no_url_gets_no_guess(load: Load, name: str, written: str) -> None:
    assert refused(load, f"{name}: {written}").endswith(
        " | correct it; .env.example tells every key and its meaning"
    )


@pytest.mark.parametrize("written", ["/srv/debian", "file:/srv/debian", "FILE:///srv/debian"])
def test_a_folder_of_this_host_is_no_url_yet(load: Load, written: str) -> None:
    for name in ("debian_mirror", "security_mirror", "download_url"):
        assert refused(load, f"{name}: {written}").endswith(" | write file:///srv/debian")
    for name in ("apt_proxy", "image_mirror"):
        assert "file:///" not in refused(load, f"{name}: {written}")


def test_a_snapshot_s_mirror_is_written_in_full_with_its_field(load: Load) -> None:
    text = refused(load, "snapshot: 20261127T090000Z\ndebian_mirror: snapshot.example/{snapshot}")
    assert text.endswith(" | write http://snapshot.example/{snapshot}")


def test_each_url_gets_its_own_hint(load: Load) -> None:
    text = refused(load, "debian_mirror: deb.example\napt_proxy: cacher:3142")
    assert text.endswith(" | write http://cacher:3142; write http://deb.example")


@pytest.mark.parametrize("url", ["ftp://h/x", "files.example/x"])
def test_where_artifacts_are_served_from_is_a_url(load: Load, url: str) -> None:
    assert "use a URL that starts with http:// or https:// or file://" in refused(
        load, f"download_url: {url}"
    )


def test_a_part_of_a_table_leaves_the_rest_as_it_was(load: Load) -> None:
    yaml = "vrrp:\n  auth_pass: '0123'\n  priority: 7\n"
    environ = {"SYSTEMVM_VRRP_PRIORITY": "9"}
    loaded = load(yaml, "vrrp.advert_int=3", "vrrp={router_id: r1}", environ=environ)
    vrrp = loaded.settings.vrrp
    assert (vrrp.auth_pass, vrrp.priority, vrrp.advert_int, vrrp.router_id) == ("0123", 9, 3, "r1")
    shown = [loaded.origins[f"vrrp.{key}"] for key in ("auth_pass", "priority", "advert_int", "router_id")]
    assert shown == [
        "image.yaml:2",
        "environment SYSTEMVM_VRRP_PRIORITY",
        "--set vrrp.advert_int",
        "--set vrrp",
    ]
    wrong = refused(load, yaml.replace("7", "500"), "vrrp.advert_int=3")
    assert wrong.startswith("image.yaml:3: vrrp.priority: use 254 or less (got 500)")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("SYSTEMVM_HOSTNAME=a", "a"),
        ("  export SYSTEMVM_HOSTNAME=a  ", "a"),
        ("SYSTEMVM_HOSTNAME=a # why", "a"),
        ("SYSTEMVM_HOSTNAME='a'", "a"),
        ('SYSTEMVM_HOSTNAME="a" # why', "a"),
        ("# note\n\nSYSTEMVM_HOSTNAME=b\nSYSTEMVM_HOSTNAME=a", "a"),
        ("SYSTEMVM_HOSTNAME=a\r", "a"),
    ],
)
def test_dotenv_lines(load: Load, line: str, value: str) -> None:
    assert load(dotenv=line).settings.hostname == value


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("SYSTEMVM_PASSWORD=", ""),
        ("SYSTEMVM_PASSWORD= # none yet", ""),
        ("SYSTEMVM_PASSWORD=#1 a=b'c", "#1 a=b'c"),
        ("SYSTEMVM_PASSWORD='a # b'", "a # b"),
        ('SYSTEMVM_PASSWORD=" a\'b "', " a'b "),
        ("SYSTEMVM_PASSWORD=$(id)`id`\\", "$(id)`id`\\"),
    ],
)
def test_a_password_in_dotenv_is_taken_as_it_stands(load: Load, line: str, password: str) -> None:
    loaded = load(dotenv=line)
    assert loaded.settings.password.get_secret_value() == password
    assert loaded.origins["password"] == ".env:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HOSTNAME=x", ".env:1: HOSTNAME has no prefix | write SYSTEMVM_HOSTNAME"),
        ("\nSYSTEMVM_HOSTNAM=x", ".env:2: unknown key 'hostnam' | did you mean 'hostname'?"),
        ("SYSTEMVM_VRRP_ADVERT=2", ".env:1: unknown key 'vrrp.advert'"),
        ("what", ".env:1: not a NAME=VALUE line"),
        ("SYSTEMVM_A-B=1", ".env:1: not a NAME=VALUE line"),
        ("SYSTEMVM_HOSTNAME='x", ".env:1: the quotes do not match"),
        ("SYSTEMVM_HOSTNAME='x'y", ".env:1: the quotes do not match"),
        (b"SYSTEMVM_HOSTNAME=\xff", "cannot read .env: not UTF-8 text"),
        ("SYSTEMVM_SIZE=big", ".env:1: size: write a whole number"),
    ],
)
def test_a_mistake_in_dotenv_names_its_line(load: Load, text: str | bytes, message: str) -> None:
    assert message in refused(load, dotenv=text)


def test_a_mistake_in_the_environment_names_the_variable(load: Load) -> None:
    wrong = refused(load, environ={"SYSTEMVM_HOSTNAM": "x"})
    assert wrong.startswith("environment SYSTEMVM_HOSTNAM: unknown key 'hostnam' | did you mean 'hostname'?")
    assert refused(load, environ={"SYSTEMVM_SIZE": "1 GiB"}).startswith("environment SYSTEMVM_SIZE: size: ")


def test_all_mistakes_are_told_at_once_each_with_its_own_line(load: Load) -> None:
    told = refused(load, "size: x\npackages:\n  all:\n    - good\n    - Bad Name\nformats: vhd\nvrrp: 3\n")
    assert [line.strip().split("/")[-1] for line in told.partition(" | ")[0].split("\n")] == [
        "image.yaml:1: size: write a whole number (got 'x')",
        "image.yaml:5: packages.all: 'Bad Name' is not a package name",
        "image.yaml:6: formats: write a list, such as [a, b] (got 'vhd')",
        "image.yaml:7: vrrp: write keys with their values (got 3)",
    ]


def test_a_list_that_is_replaced_takes_its_lines_along(load: Load) -> None:
    told = refused(load, "components:\n  - main\n", "components=a/b")
    assert told.partition(" | ")[0] == "--set components: 'a/b' is not a component"


def test_keys_that_do_not_go_together_say_where_each_was_set(load: Load) -> None:
    told = refused(load, "suite: trixie\n", "arch=i386")
    assert told.split("/")[-1].startswith("image.yaml:1, --set arch: trixie has no kernel for i386")
    told = refused(load, "suite: bookworm\nfirmware: [uefi]\n", "arch=i386")  # its text does not name arch
    assert told.startswith("--set arch, ")
    assert "image.yaml:2: i386 boots under BIOS only" in told


def test_a_secret_is_in_no_message_and_no_listing(load: Load) -> None:
    loaded = load(environ={"SYSTEMVM_PASSWORD": "geheim"}, password="geheimer")
    assert loaded.settings.password.get_secret_value() == "geheimer"
    assert loaded.origins["password"] == "--ask-password"
    assert "geheim" not in f"{loaded} {loaded.settings!r} {loaded.settings.model_dump_json()}"
    for text in (
        refused(load, environ={"SYSTEMVM_PASSWORD": "geheim\n"}),
        refused(load, "vrrp: {auth_pass: [geheim]}"),
        refused(load, 'vrrp: {auth_pass: "geheim\\n"}'),
        refused(load, "vrrp: {state: MASTER, auth_pass: geheim}"),
    ):
        assert "geheim" not in text


SHA512 = "$6$salt$" + "x" * 86
YESCRYPT = "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$X3DX6M94c7o.9agCG9G317fhZg9SqC.5i5rd.RhAtQ7"
BCRYPT = "$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"
HASHES = {
    "sha512crypt": SHA512,
    "sha512crypt with rounds": SHA512.replace("$salt", "$rounds=50000$./AZaz09"),
    "yescrypt": YESCRYPT,
    "gost-yescrypt": YESCRYPT.replace("$y$", "$gy$"),
    "scrypt": "$7$CU..../....2Q9obwLhin8qvQl6sisAO/$" + "E" * 43,
    "bcrypt": BCRYPT,
    "bcrypt of old": BCRYPT.replace("$2b$", "$2a$"),
}
NO_HASHES = {
    "a password": "geheim",
    "cut off by a shell": ".geheim",
    "cut short": SHA512[:-1],
    "too long": SHA512 + "x",
    "two fields": SHA512[:-1] + ":",
    "two lines": SHA512 + "\n",
    "another alphabet": SHA512[:-1] + "_",
    "a long salt": SHA512.replace("salt", "salt" * 5),
    "no salt": SHA512.replace("salt", ""),
    "bcrypt with the bug": BCRYPT.replace("$2b$", "$2x$"),
    "md5crypt": "$1$saltsalt$" + "x" * 22,
    "DES": "xxj31ZMTZzkVA",
    "locked": "!" + SHA512,
    "no password": "*",
}


@pytest.mark.parametrize("hashed", HASHES.values(), ids=HASHES)
def test_a_hash_of_crypt_is_taken_from_environment_and_dotenv(load: Load, hashed: str) -> None:
    for loaded in (
        load(environ={"SYSTEMVM_PASSWORD_HASH": hashed}),
        load(dotenv=f"SYSTEMVM_PASSWORD_HASH={hashed}\n"),
        load(dotenv=f"SYSTEMVM_PASSWORD_HASH='{hashed}' # of root\n"),
    ):
        assert loaded.settings.password_hash.get_secret_value() == hashed
        assert loaded.settings.opens_root
        assert loaded.settings.shown()["password_hash"] == "(set)"
        assert hashed not in f"{loaded} {loaded.settings!r} {loaded.settings.model_dump_json()}"
    assert not load(dotenv="").settings.opens_root


@pytest.mark.parametrize("text", NO_HASHES.values(), ids=NO_HASHES)
def test_what_is_no_fit_hash_is_refused_without_showing_it(load: Load, text: str) -> None:
    told = refused(load, environ={"SYSTEMVM_PASSWORD_HASH": text})
    assert told.startswith("environment SYSTEMVM_PASSWORD_HASH: ")
    assert "not a whole hash of crypt(5)" in told
    assert len(text) < 2 or text.strip() not in told


def test_a_password_and_a_hash_together_say_where_each_was_set(load: Load) -> None:
    told = refused(load, dotenv="SYSTEMVM_PASSWORD=geheim\n", environ={"SYSTEMVM_PASSWORD_HASH": SHA512})
    where, _, what = told.partition(": password and")
    assert {*where.split(", ")} == {".env:1", "environment SYSTEMVM_PASSWORD_HASH"}
    assert "both set" in what
    assert "geheim" not in told
    assert SHA512 not in told
    empty = {"SYSTEMVM_PASSWORD_HASH": SHA512, "SYSTEMVM_PASSWORD": ""}
    assert load(dotenv="SYSTEMVM_PASSWORD=geheim\n", environ=empty).settings.opens_root


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_package_list_is_the_suites_without_repeats(load: Load, suite: str) -> None:
    yaml = "packages: {all: [bash, curl], bookworm: [old, bash], trixie: [new]}\njre: openjdk-headless\n"
    listed = load(yaml, f"suite={suite}").settings.package_list
    assert listed[:3] == ("bash", "curl", "old" if suite == "bookworm" else "new")
    assert {KERNELS[(suite, "amd64")], "openjdk-headless"} <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(("arch", "firmware"), [("amd64", ("bios", "uefi")), ("i386", ("bios",))])
def test_the_arch_decides_the_firmware(load: Load, arch: str, firmware: tuple[str, ...]) -> None:
    assert load(f"arch: {arch}").settings.boots_under == firmware


def test_overlays_lie_beside_the_definition(load: Load, tmp_path: Path) -> None:
    (tmp_path / "my overlay").mkdir()
    assert load("rootfs: ['my overlay']").overlays == (Path("my overlay"),)


def answer(environ: Mapping[str, str], *overrides: str) -> BuildError | None:
    """The refusal of these values, if they are refused."""
    try:
        settings.load(CHECKOUT / "config" / "tiny.yaml", environ, None, overrides)
    except BuildError as error:
        return error
    return None


@given(st.text().filter(lambda key: key.lower() not in Settings.model_fields), st.text())
def test_any_unknown_flag_is_refused_with_a_hint(key: str, value: str) -> None:
    error = answer({}, f"{key}={value}")
    assert error is not None
    assert error.hint


@given(st.sampled_from(sorted(Settings.model_fields)), st.text())
def test_any_value_is_read_or_refused_with_a_hint(key: str, value: str) -> None:
    error = answer({f"SYSTEMVM_{key.upper()}": value})
    assert error is None or error.hint


@given(st.text().filter(str.isprintable).filter(lambda text: "'" not in text))
def test_quotes_keep_any_printable_text(text: str) -> None:
    assert sources._unquote(f"'{text}'", "x") == text


def test_the_example_lists_every_key_once_with_its_default() -> None:
    text = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    named = re.findall(r"^#? ?SYSTEMVM_([A-Z0-9_]+)=", text, re.M)
    tables = {name for name, field in Settings.model_fields.items() if settings._is_table(field.annotation)}
    keys = {name for name in Settings.model_fields if name not in tables}
    for table in tables:
        keys |= {f"{table}_{name}" for name in Settings.model_fields[table].annotation.model_fields}  # type: ignore[union-attr]
    assert sorted(name.lower() for name in named) == sorted(keys)


def test_the_example_says_nothing_else_than_the_defaults(tmp_path: Path) -> None:
    text = (CHECKOUT / ".env.example").read_text(encoding="utf-8")
    (tmp_path / ".env").write_text(re.sub(r"^# ?(SYSTEMVM_)", r"\1", text, flags=re.M), encoding="utf-8")
    (tmp_path / "image.yaml").touch()
    assert settings.load(tmp_path / "image.yaml", {}, tmp_path / ".env").settings == Settings()
