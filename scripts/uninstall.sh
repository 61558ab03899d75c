#!/bin/sh
# Removes what install.sh put below PREFIX (and DESTDIR). Manifest, prompts and caches stay, unless PURGE=1.
set -eu
PREFIX=${PREFIX:-/usr/local} DESTDIR=${DESTDIR:-} PURGE=${PURGE:-}
units=${UNITDIR:-/etc/systemd/system} sysusers=${SYSUSERSDIR:-/usr/lib/sysusers.d} tmpfiles=${TMPFILESDIR:-/usr/lib/tmpfiles.d}

if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now rkcached.socket rkcached-admin.socket rkcached.service || true
fi
for unit in rkcached.service rkcached.socket rkcached-admin.socket; do
    rm -f "$DESTDIR$units/$unit"
done
rm -f "$DESTDIR$units/rkcached.service.d/backoff.conf"
rmdir "$DESTDIR$units/rkcached.service.d" 2>/dev/null || true
rm -rf "$DESTDIR$PREFIX/lib/rkcached" "$DESTDIR$PREFIX/lib/rkcached.new" "$DESTDIR$PREFIX/lib/rkcached.old"
rm -f "$DESTDIR$PREFIX/bin/rkcached" "$DESTDIR$sysusers/rkcached.conf" "$DESTDIR$tmpfiles/rkcached.conf" \
    "$DESTDIR$tmpfiles/rkcached-image.conf" \
    "$DESTDIR$PREFIX"/share/man/man[1-8]/rkcached*.[1-8] "$DESTDIR$PREFIX/share/bash-completion/completions/rkcached" \
    "$DESTDIR$PREFIX/share/zsh/site-functions/_rkcached" "$DESTDIR$PREFIX/share/fish/vendor_completions.d/rkcached.fish" \
    "$DESTDIR"/etc/udev/rules.d/*rkcached*.rules
if [ "$PURGE" = 1 ]; then
    rm -rf "$DESTDIR/etc/rkcached" "$DESTDIR/etc/default/rkcached" "$DESTDIR/var/lib/rkcached" "$DESTDIR/var/cache/rkcached" \
        "$DESTDIR$units/rkcached.service.d" "$DESTDIR$units/rkcached.socket.d"
    [ -n "$DESTDIR" ] || rm -rf /run/rkcached /run/rkcached-work
    # The user stays, as Debian's policy has it: files elsewhere may still be its own.
fi
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl reset-failed 'rkcached*' 2>/dev/null || true
fi
