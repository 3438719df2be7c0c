# SPDX-License-Identifier: Apache-2.0
"""From source files to the canonical dataset."""

from fastrec.data.prepare.run import prepare

__all__ = ["prepare"]
