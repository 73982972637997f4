"""What is said to be the oldest version is the one that `make test-oldest` runs."""

import re

from packaging.version import Version

from paths import ROOT


def test_each_oldest_version_is_what_is_asked_for():
    asked = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    least = {name: Version(version) for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', asked)}
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.M))
    assert len(least) == asked.count('"') // 2
    assert {name: Version(pinned[name]) for name in least} == least
