#!/bin/bash
# Become the first process of a machine: systemd as system manager in namespaces of its own, on a copy-on-write view
# of this one's root. Nothing is written outside FOLDER, and all of it is gone when this process is killed.
#   boot.sh FOLDER PYTHON TREE...     PYTHON: a prefix; TREE: copied over the root, or FOLDER=PLACE: shown there
set -euo pipefail
folder=$1 python=$2
shift 2

mount -t tmpfs -o mode=755 tmpfs "$folder"
mkdir "$folder"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
cd "$folder/root"
for tree in "$@"; do
    case $tree in
    *=*)
        mkdir -p "./${tree#*=}"
        mount --bind "${tree%%=*}" "./${tree#*=}"
        ;;
    *) cp -a "$tree/." . ;;
    esac
done

mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys # else systemd-sysctl would change the kernel of everybody
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/shm dev/pts
for name in null zero full random urandom tty; do
    : >"dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
for name in console kmsg; do
    : >"dev/$name"
    mount --bind /dev/null "dev/$name"
done
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for number in 0 1 2; do ln -s "/proc/self/fd/$number" "dev/$number"; done

# This machine's Python 3.13 where every user finds it: a hardened unit does not see /root and /home.
mkdir -p usr/local/lib/python3.13
mount --bind "$python/lib/python3.13" usr/local/lib/python3.13
cp "$python/bin/python3.13" usr/local/bin
find "$python/lib" -maxdepth 1 -name 'libpython3*.so*' -exec cp -t usr/local/lib {} +
chroot . ldconfig

# Of the services of this root only those that every system has, and not what would reach out of the namespaces.
for unit in systemd-{timesyncd,logind,udevd,networkd,resolved}.service sys-kernel-{debug,tracing}.mount; do
    ln -sf /dev/null "etc/systemd/system/$unit"
done
printf '[Unit]\nRequires=sysinit.target sockets.target dbus.socket\nAfter=sysinit.target sockets.target dbus.socket\n' \
    >etc/systemd/system/machine.target
rm -f etc/systemd/system/sockets.target.wants/* etc/systemd/system/multi-user.target.wants/*
hostname machine
ip link set lo up

pivot_root . mnt
umount -l /mnt
mount --make-rshared / # in a container systemd leaves that to others, and credentials need it
exec env -i container=machine PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    /lib/systemd/systemd --system --unit=machine.target --show-status=no --log-target=journal-or-kmsg
