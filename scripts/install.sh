#!/bin/sh
# Installs rkcached below PREFIX with a Python environment of its own, its units, and its configuration; `make install`
# calls it. Run again, it upgrades in place: manifest, prompts and caches stay, a running daemon is restarted.
# Packages are those that packaging/locks pins; a file with another SHA-256 ends the installation.
#
#   PREFIX   where the program goes (/usr/local)          DESTDIR  the root of an image that is not running
#   PYTHON   which Python 3.11 or newer to use (python3)  EXTRAS   engines to install for (cpu,rkllm)
#
# With DESTDIR nothing is taken from this machine: Python, architecture and systemd are those that the image has, or that
# are named: TARGET_PYTHON=3.13 TARGET_MACHINE=aarch64 TARGET_SYSTEMD=257. PYTHON then is only a tool. The user and what
# belongs to it come at the image's first boot, by systemd-sysusers and systemd-tmpfiles.
set -eu
cd "$(dirname "$0")/.."
PREFIX=${PREFIX:-/usr/local} DESTDIR=${DESTDIR:-} PYTHON=${PYTHON:-python3} EXTRAS=${EXTRAS-cpu,rkllm}
units=${UNITDIR:-/etc/systemd/system} sysusers=${SYSUSERSDIR:-/usr/lib/sysusers.d} tmpfiles=${TMPFILESDIR:-/usr/lib/tmpfiles.d}
home=$PREFIX/lib/rkcached

# `put MODE FILE TARGET` installs a file with its @PLACES@ filled in, for whoever may read it.
put() {
    mkdir -p "$(dirname "$DESTDIR$3")"
    sed "s|@BIN@|$PREFIX/bin|g" "$2" >"$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}

umask 022
mkdir -p "$DESTDIR$PREFIX/lib" "$DESTDIR$PREFIX/bin"

# The pinned packages of the program and of each engine.
set -- -r packaging/locks/base.txt
for extra in $(echo "$EXTRAS" | tr , ' '); do
    if [ ! -e "packaging/locks/$extra.txt" ]; then
        echo "EXTRAS=$EXTRAS: there is no engine $extra; name cpu, rkllm, or both with a comma" >&2
        exit 64
    fi
    set -- "$@" -r "packaging/locks/$extra.txt"
done

# The new environment is complete before it takes the old one's place. Started by -m, it does not know its own path.
rm -rf "$DESTDIR$home.new"
work=$(mktemp -d)
trap 'rm -rf "$DESTDIR$home.new" "$work"' EXIT
"$PYTHON" -m venv "$work/tools"
tools() { "$work/tools/bin/python" -m "$@"; }
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
tools pip install --require-hashes -r packaging/locks/build.txt
if [ -n "$DESTDIR" ]; then
    "$work/tools/bin/python" packaging/image.py --root "$DESTDIR" --work "$work" --extras "$EXTRAS" \
        --python "${TARGET_PYTHON:-}" --machine "${TARGET_MACHINE:-}" "$DESTDIR$home.new"
else
    # What has no wheel is built by the tools, which are pinned, too; pip would download others to build it.
    tools pip wheel --require-hashes --no-deps --no-build-isolation --only-binary :all: --no-binary sdnotify \
        --wheel-dir "$work/wheels" "$@"
    tools pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" .
    "$PYTHON" -m venv --without-pip "$home.new"
    tools pip --python "$home.new" install --no-deps --no-index "$work"/wheels/*.whl
    lack=$(PIP_QUIET=0 tools pip --python "$home.new" check) || { echo "$lack" >&2 && exit 1; }
    find "$home.new/bin" -type f -delete
fi
rm -rf "$DESTDIR$home.old"
[ ! -e "$DESTDIR$home" ] || mv "$DESTDIR$home" "$DESTDIR$home.old"
mv "$DESTDIR$home.new" "$DESTDIR$home"
rm -rf "$DESTDIR$home.old"

cat >"$DESTDIR$PREFIX/bin/rkcached.new" <<END
#!/bin/sh
exec $home/bin/python -Im rkcached "\$@"
END
chmod 755 "$DESTDIR$PREFIX/bin/rkcached.new"
mv -f "$DESTDIR$PREFIX/bin/rkcached.new" "$DESTDIR$PREFIX/bin/rkcached"

for unit in rkcached.service rkcached.socket rkcached-admin.socket; do
    put 644 "systemd/$unit" "$units/$unit"
done
if [ -n "$DESTDIR" ]; then
    # As the name of a library of its own says.
    library=$(find "$DESTDIR/usr/lib" -path '*/systemd/libsystemd-shared-[0-9]*.so' 2>/dev/null | head -n 1)
    version=${TARGET_SYSTEMD:-$(echo "${library##*/}" | sed -n 's/[^0-9]*\([0-9]*\).*/\1/p')}
else
    version=$(systemctl --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9]*\).*/\1/p')
fi
[ "${version:-0}" -lt 254 ] || put 644 systemd/backoff.conf "$units/rkcached.service.d/backoff.conf"
put 644 systemd/rkcached.sysusers "$sysusers/rkcached.conf"
put 644 systemd/rkcached.tmpfiles "$tmpfiles/rkcached.conf"
for rule in etc/udev/rules.d/*.rules; do
    [ ! -e "$rule" ] || put 644 "$rule" "/etc/udev/rules.d/${rule##*/}"
done
for page in man/*.[1-8]; do
    [ ! -e "$page" ] || put 644 "$page" "$PREFIX/share/man/man${page##*.}/${page##*/}"
done
[ ! -e completions/rkcached.bash ] || put 644 completions/rkcached.bash "$PREFIX/share/bash-completion/completions/rkcached"
[ ! -e completions/_rkcached ] || put 644 completions/_rkcached "$PREFIX/share/zsh/site-functions/_rkcached"
[ ! -e completions/rkcached.fish ] || put 644 completions/rkcached.fish "$PREFIX/share/fish/vendor_completions.d/rkcached.fish"

# What the administrator may have edited is never replaced.
manifest=etc/rkcached/manifest.yaml
[ -e "$manifest" ] || manifest=etc/rkcached/manifest.example.yaml
first=
if [ ! -e "$DESTDIR/etc/rkcached/manifest.yaml" ]; then
    first=1
    put 640 "$manifest" /etc/rkcached/manifest.yaml
    for prompt in etc/rkcached/prompts/*; do
        [ ! -e "$prompt" ] || [ -e "$DESTDIR/$prompt" ] || put 640 "$prompt" "/$prompt"
    done
fi
for defaults in etc/default/rkcached; do
    [ ! -e "$defaults" ] || [ -e "$DESTDIR/$defaults" ] || put 644 "$defaults" "/$defaults"
done
mkdir -p "$DESTDIR/etc/rkcached/prompts"
chmod 750 "$DESTDIR/etc/rkcached" "$DESTDIR/etc/rkcached/prompts"

if [ -n "$DESTDIR" ]; then
    put 644 systemd/rkcached-image.tmpfiles "$tmpfiles/rkcached-image.conf"
    touch "$DESTDIR/usr" # systemd.unit(5), ConditionNeedsUpdate=: an image that has booted before looks for new users
    cat <<END
installed: $DESTDIR$PREFIX/bin/rkcached
next: set a model's path in $DESTDIR/etc/rkcached/manifest.yaml, then
      sudo systemctl --root=$DESTDIR enable rkcached
END
    exit 0
fi
systemd-sysusers "$sysusers/rkcached.conf"
systemd-tmpfiles --create "$tmpfiles/rkcached.conf"
# Written by root, readable by the daemon and its group: a prompt is nobody else's business.
chown root:rkcached /etc/rkcached /etc/rkcached/prompts
[ -z "$first" ] || chown -R root:rkcached /etc/rkcached
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl try-restart rkcached.service
    if command -v udevadm >/dev/null && udevadm control --reload 2>/dev/null; then
        udevadm trigger --subsystem-match=drm --subsystem-match=misc --subsystem-match=dma_heap || true
    fi
fi
echo "installed: $PREFIX/bin/rkcached"
[ -z "$first" ] || cat <<END
Next, put a model into /srv/models (docs/models.md says where to get one):
  sudo rkcached init /srv/models -m /etc/rkcached/manifest.yaml
END
