#!/bin/sh
# Puts a newer systemd for Debian 12 into FOLDER/root, to lie over a machine's root. Nothing is installed.
#   backports.sh FOLDER
set -eu
cd "$1"
mkdir -p state/lists/partial cache/archives/partial packages root
echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main' >sources.list
apt() {
    apt-get -qq -o "Dir::State=$1/state" -o "Dir::Cache=$1/cache" -o "Dir::Etc::SourceList=$1/sources.list" \
        -o Dir::Etc::SourceParts=/dev/null "$2" $3
}
apt "$PWD" update ''
folder=$PWD
cd packages
apt "$folder" download 'systemd/bookworm-backports libsystemd0/bookworm-backports libsystemd-shared/bookworm-backports'
for package in *.deb; do
    dpkg-deb -x "$package" ../root
done
cd ../root
for name in bin sbin lib; do # as on a system whose /lib is /usr/lib
    if [ -d "$name" ]; then
        mkdir -p "usr/$name"
        cp -a "$name/." "usr/$name"
        rm -r "$name"
    fi
done
