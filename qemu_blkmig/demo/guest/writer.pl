# Writes numbered, checksummed records to the disks without pause, in an order that records.py can compute again.
#
#   writer.pl KIND RATE SPAN DISK...     KIND: idle random hot sequential zipf log; RATE: records a second on each
#   disk, 0: as fast as it goes; SPAN: most bytes of records on a disk; DISK: vda
#
# The layout of a record and the place of record N are described in records.py; both must say the same. Writing is
# O_DIRECT: when a write returns, the record has reached the virtual disk. Core perl only: perl-base has no modules
# for the clock or for direct I/O, hence the system calls by their number (x86-64).
use strict;
use integer;

my ($kind, $rate, $span, @disks) = @ARGV;
my %KINDS = (idle => 0, random => 1, hot => 2, sequential => 3, zipf => 4, log => 5);
my ($SYS_PWRITE, $SYS_CLOCK_GETTIME, $O_RDWR, $O_DIRECT) = (18, 228, 2, 040000);
my ($BLKGETSIZE64, $BLKDISCARD, $BLKZEROOUT, $RTC_RD_TIME) = (0x80081272, 0x1277, 0x127f, 0x80247009);
my ($DAY, $SECOND, $ACK_EVERY) = (86400, 1_000_000, 250_000);
my ($GOLDEN, $K_BLOCK, $K_TIME, $K_GAP, $K_GEOMETRY) = (
    -7046029254386353131, -4417276706812531889, 1609587929392839161, -8796714831421723037, 2870177450012600261);

exists $KINDS{$kind} or die "blkmig error: unknown writer '$kind'\n";
open(my $console, '>', '/dev/ttyS0') or die "blkmig error: /dev/ttyS0: $!\n";
my $has_rtc = open(my $rtc, '<', '/dev/rtc0');

for my $disk (@disks) {
    my $child = fork() // die "blkmig error: fork: $!\n";
    if (!$child) { write_records($disk); exit 1; }
}
1 while wait() > 0;

sub say_line { syswrite($console, "blkmig $_[0]\n"); }

sub clock {
    my $spec = "\0" x 16;
    syscall($SYS_CLOCK_GETTIME, $_[0], $spec);
    my ($seconds, $nanoseconds) = unpack('q<2', $spec);
    return $seconds * $SECOND + $nanoseconds / 1000;
}

sub now { return clock(1); }

sub mix {
    my $z = $_[0];
    $z = ($z ^ (($z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687;
    $z = ($z ^ (($z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685;
    return $z ^ (($z >> 31) & 0x1FFFFFFFF);
}

# The guest's own clocks stand still while it is paused, the battery-backed one keeps the host's time. Its seconds
# turn over at moments known by the guest's clock to within one look; where the two drifted apart, the guest was
# paused. A pause lies within one or two neighbouring seconds, hence the comparison over two.
my (@edges, $host_second, $looked);
my ($longest, $longest_here) = (0, 0);

sub host_second {
    my $time = "\0" x 36;
    ioctl($rtc, $RTC_RD_TIME, $time) or return undef;
    my ($second, $minute, $hour) = unpack('l<3', $time);
    return ($hour * 60 + $minute) * 60 + $second;
}

sub look_at_host_clock {
    return if !$has_rtc;
    my $before = now();
    return if defined $looked && $before - $looked < 1000;
    my $second = host_second() // return;
    if (defined $host_second && $second != $host_second) {
        push @edges, [$second, $looked, now(), $longest_here];
        $longest_here = 0;
        judge_pause() if @edges > 2;
    }
    ($host_second, $looked) = ($second, $before);
}

sub judge_pause {
    my ($first, $middle, $last) = @edges;
    my $host = ($last->[0] - $first->[0] + $DAY) % $DAY * $SECOND;
    my $hidden = $host - ($last->[2] - $first->[1]);
    my $gap = $hidden + ($middle->[3] > $last->[3] ? $middle->[3] : $last->[3]);
    $longest = $gap if $hidden > 0 && $gap > $longest;
    shift @edges;
}

# What operation N does: (what, first position, positions). The same in records.py, operation().
my ($epoch, $count, $zone, $run);

sub operation {
    my $n = $_[0];
    my $draw = mix($epoch + $n * $GOLDEN);
    my ($low, $high) = ($draw & 0x7fffffff, ($draw >> 33) & 0x7fffffff);
    return ('write', 0, 1) if $n == 1;
    if ($zone < $count && $n % 8 == 0) {
        my $position = $zone + $low % ($count - $zone);
        return ('write', $position, 1) if $n % 16 == 8;
        my $length = $run ? 1 + $high % 8 : 1;
        $length = $count - $position if $length > $count - $position;
        return ($n % 64 == 0 ? 'discard' : 'zero', $position, $length);
    }
    return ('write', ($zone < $count ? $n - 1 - $n / 8 : $n - 1) % $zone, 1) if $kind eq 'sequential';
    if ($kind eq 'zipf') {
        my $bits = 0;
        $bits++ while 1 << $bits <= $zone;
        $bits = $high % $bits;
        return ('write', ((1 << $bits) - 1 + $low % (1 << $bits)) % $zone, 1);
    }
    if ($kind eq 'log') {
        my $half = $zone / 2;
        return ('write', $n % 16 == 1 ? $low % 4 % $zone : $half + $n % ($zone - $half), 1);
    }
    my $hot = $zone / 10 || 1;
    return ('write', $low % ($kind eq 'hot' && $high % 10 < 9 ? $hot : $zone), 1);
}

sub write_records {
    my $disk = $_[0];
    sysopen(my $device, "/dev/$disk", $O_RDWR | $O_DIRECT) or die "blkmig error: $disk: $!\n";
    my $answer = "\0" x 8;
    ioctl($device, $BLKGETSIZE64, $answer) or die "blkmig error: size of $disk: $!\n";
    my $size = unpack('q<', $answer);
    my $block_size = $size < 65536 ? 512 : 4096;
    my $blocks = $size / $block_size;
    $count = $span / $block_size < $blocks ? $span / $block_size : $blocks;
    $zone = $count < 64 ? $count : $count - $count / 8;
    $run = $count == $blocks;
    $epoch = clock(0);
    my $geometry = $count | $KINDS{$kind} << 32;
    my $words = $block_size / 8 - 7;

    my $buffer = "\0" x 8192;
    my $address = unpack('q<', pack('p', $buffer));
    my $align = -$address & 4095;
    my $place = sub { $count == 1 ? 0 : $_[0] * ($blocks - 1) / ($count - 1) };

    say_line("writer $disk epoch $epoch block $block_size count $count kind $kind");
    my ($n, $written, $acked_at, $start) = (0, 0, 0, now());
    my $last = $start;
    while (1) {
        $n++;
        my ($what, $position, $length) = operation($n);
        my $block = $place->($position);
        if ($what eq 'write') {
            my $time = now();
            my $check = mix($epoch + $n * $GOLDEN + $block * $K_BLOCK + $time * $K_TIME
                + $longest * $K_GAP + $geometry * $K_GEOMETRY);
            substr($buffer, $align, $block_size) =
                pack('a8q<6', 'BLKMIGR1', $epoch, $n, $block, $time, $longest, $geometry) . pack('q<', $check) x $words;
            until (syscall($SYS_PWRITE, fileno($device), $address + $align, $block_size, $block * $block_size)
                == $block_size) {
                say_line("error $disk record $n: $!");
                select(undef, undef, undef, 1);
            }
            $written = $n;
        } else {
            my $range = pack('Q<2', $block * $block_size, $length * $block_size);
            if (!ioctl($device, $what eq 'zero' ? $BLKZEROOUT : $BLKDISCARD, $range) && $what eq 'zero') {
                say_line("error $disk zero $n: $!");
            }
        }
        my $done = now();
        my $gap = $done - $last;
        $last = $done;
        $longest_here = $gap if $gap > $longest_here;
        $longest = $gap if $gap > $longest;
        look_at_host_clock();
        if ($done - $acked_at >= $ACK_EVERY) {
            say_line("ack $disk seq $written gap_us $longest");
            $acked_at = $done;
        }
        wait_until($start + $n * $SECOND / $rate) if $rate;
        if ($rate && now() - $start > $n * $SECOND / $rate + $SECOND) {
            $start = now() - $n * $SECOND / $rate;
        }
    }
}

# Sleeps in short pieces, so that a pause of the guest shows in the host's clock.
sub wait_until {
    my $due = $_[0];
    while ((my $left = $due - now()) > 0) {
        look_at_host_clock();
        my $piece = $left < 10_000 ? $left : 10_000;
        no integer;
        select(undef, undef, undef, $piece / 1e6);
    }
}
