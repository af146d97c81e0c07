# Writes numbered files into a mounted file system, each fsynced before the next: files.pl DIRECTORY RATE
#
# File N is DIRECTORY/N % 64, its content the line "N\n" as often as fills 8 KiB; a console line tells the largest N that is safe.
use strict;

my ($directory, $rate) = @ARGV;
my ($SYS_FSYNC, $FILES, $SIZE) = (74, 64, 8192);
open(my $console, '>', '/dev/ttyS0') or die "blkmig error: /dev/ttyS0: $!\n";

for (my $n = 1; ; $n++) {
    my $name = "$directory/" . $n % $FILES;
    my $line = "$n\n";
    open(my $file, '>', "$name.new") or die "blkmig error: $name.new: $!\n";
    syswrite($file, $line x ($SIZE / length $line)) or die "blkmig error: $name.new: $!\n";
    syscall($SYS_FSYNC, fileno($file)) == 0 or die "blkmig error: fsync $name.new: $!\n";
    close($file);
    rename("$name.new", $name) or die "blkmig error: $name: $!\n";
    syswrite($console, "blkmig ack files seq $n gap_us 0\n");
    select(undef, undef, undef, 1 / ($rate || 20));
}
