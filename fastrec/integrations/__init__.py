# SPDX-License-Identifier: Apache-2.0
"""Fused functions in place of those of other libraries; each is imported where it is patched."""
