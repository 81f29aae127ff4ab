//! A guest in 64 KiB of firmware, for tests: it beats on the serial port, writes to its memory at a set rate and finds
//! corruption by itself. Give the image to QEMU as `-bios`, with 16 MiB of memory. The source is `guests/rom/rom.S`.

static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/rom.bin"));

/// Where the parameters are in the image.
const PARAMETERS: usize = 0x400;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Names this guest in every line it says.
    pub token: u32,
    /// Ticks of 10 ms between two beats; 0 counts as 1.
    pub beat_ticks: u32,
    /// Pages of 4 KiB it writes to a tick; 0 for none. 25 is about 10 MiB a second.
    pub pages_per_tick: u32,
    /// First byte of the memory it writes to, from 1 MiB on.
    pub first: u32,
    /// The byte after the last.
    pub last: u32,
    /// Ticks of 10 ms between two frames from its first network interface, which must be an `rtl8139`; 0 for none.
    pub frame_ticks: u32,
    /// Blocks of 4 KiB that it writes and checks in turn on its first disk, which must be of bus `virtio`; 0 for none. A visit
    /// takes two ticks or more.
    pub disk_blocks: u32,
    /// Blocks from the beginning of one of those to that of the next; 0 counts as 1.
    pub disk_stride: u32,
    /// Whether the pages it writes to are full of what cannot be compressed; otherwise they are all but empty, and a migration
    /// that compresses, or that leaves out what has not changed, has next to nothing to send.
    pub noise: bool,
}

impl Default for Parameters {
    /// Ten beats a second, about 1 MiB a second written to 4 MiB of memory, nothing to a disk.
    fn default() -> Self {
        Parameters {
            token: 0,
            beat_ticks: 10,
            pages_per_tick: 3,
            first: 0x10_0000,
            last: 0x50_0000,
            frame_ticks: 0,
            disk_blocks: 0,
            disk_stride: 1,
            noise: false,
        }
    }
}

/// The firmware image with these parameters: 64 KiB.
pub fn image(parameters: Parameters) -> Vec<u8> {
    let first = parameters.first.max(0x10_0000) & !0xfff;
    let last = (parameters.last & !0xfff).max(first + 0x1000);
    let mut image = IMAGE.to_vec();
    let values = [
        parameters.token,
        parameters.beat_ticks.max(1),
        parameters.pages_per_tick,
        first,
        last,
        parameters.frame_ticks,
        parameters.disk_blocks,
        parameters.disk_stride.max(1),
        u32::from(parameters.noise),
    ];
    for (n, value) in values.into_iter().enumerate() {
        let at = PARAMETERS + 4 * n;
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    image
}

/// A line that the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// It started. Seen twice, it was started twice.
    Start {
        /// Its name.
        token: u32,
    },
    /// It runs.
    Beat {
        /// Its name.
        token: u32,
        /// One more than the last time.
        count: u32,
        /// How often it has been through its memory.
        pass: u32,
        /// How many corrupted pages it has found.
        errors: u32,
    },
    /// It found a page that is not what it wrote.
    Corrupt {
        /// The page's address.
        address: u32,
    },
    /// It found a block of its disk that is not what it wrote, or that could not be read or written.
    CorruptBlock {
        /// The block's number, in the order in which they are visited.
        block: u32,
    },
    /// It powers itself off.
    Off,
}

impl Line {
    /// Reads a line, which may have something in front of it (`console: `) and a line end behind it.
    pub fn parse(line: &str) -> Option<Line> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let hex = |word: &str| (word.len() == 8).then(|| u32::from_str_radix(word, 16).ok()).flatten();
        match words.as_slice() {
            [.., "beat", token, count, pass, errors] => {
                Some(Line::Beat { token: hex(token)?, count: hex(count)?, pass: hex(pass)?, errors: hex(errors)? })
            }
            [.., "start", token] => Some(Line::Start { token: hex(token)? }),
            [.., "X", address] => Some(Line::Corrupt { address: hex(address)? }),
            [.., "D", block] => Some(Line::CorruptBlock { block: hex(block)? }),
            [.., "off"] => Some(Line::Off),
            _ => None,
        }
    }
}

/// EtherType of the guest's frames: the first of those that IEEE 802 leaves to local experiments.
pub const FRAME_TYPE: u16 = 0x88b5;

/// A frame that the guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The address of the interface that sent it.
    pub mac: [u8; 6],
    /// Its name.
    pub token: u32,
    /// One more than the last time, from 1.
    pub count: u32,
    /// How many corrupted pages and blocks it has found.
    pub errors: u32,
    /// How many of its writes the disk has acknowledged.
    pub writes: u32,
}

impl Frame {
    /// Reads a whole Ethernet frame; none where it is not one of the guest's.
    pub fn parse(bytes: &[u8]) -> Option<Frame> {
        let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let typed = bytes.get(12..14)? == FRAME_TYPE.to_be_bytes() && bytes.get(14..18)? == b"beat";
        let mac = bytes.get(6..12)?.try_into().ok()?;
        typed.then_some(())?;
        Some(Frame { mac, token: number(18)?, count: number(22)?, errors: number(26)?, writes: number(30)? })
    }
}

/// Follows what a guest says, wherever it says it, and notices when it was restarted, ran twice or lost memory.
#[derive(Clone, Debug, Default)]
pub struct Story {
    starts: u32,
    count: u32,
    wrong: Option<String>,
}

impl Story {
    /// Takes the next thing said.
    pub fn hear(&mut self, line: &str) {
        let complaint = match Line::parse(line) {
            Some(Line::Start { .. }) => {
                self.starts += 1;
                (self.starts > 1).then(|| "it was started again".to_string())
            }
            Some(Line::Beat { count, errors, .. }) => {
                let last = std::mem::replace(&mut self.count, count);
                if errors > 0 {
                    Some(format!("it counts {errors} corrupted pages"))
                } else {
                    (count <= last).then(|| format!("beat {count} came after beat {last}: it went back or runs twice"))
                }
            }
            Some(Line::Corrupt { address }) => Some(format!("the page at {address:#x} is corrupted")),
            Some(Line::CorruptBlock { block }) => Some(format!("block {block} of the disk is corrupted")),
            Some(Line::Off) | None => None,
        };
        if self.wrong.is_none() {
            self.wrong = complaint;
        }
    }

    /// The last beat's count.
    pub fn beats(&self) -> u32 {
        self.count
    }

    /// What first went wrong, if anything has.
    pub fn complaint(&self) -> Option<&str> {
        self.wrong.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_64_kib_with_a_jump_at_the_reset_vector_and_the_parameters_in_place() {
        let image = image(Parameters { token: 0xcafe_0123, ..Parameters::default() });
        assert_eq!(image.len(), 0x10000);
        assert_eq!(image[0xfff0], 0xe9);
        assert_eq!(image[0x400..0x404], [0x23, 0x01, 0xfe, 0xca]);
        assert_eq!(IMAGE[0x404..0x408], [10, 0, 0, 0], "the parameters have moved in rom.S");
        assert_eq!(IMAGE[0x40c..0x410], [0, 0, 0x10, 0], "the parameters have moved in rom.S");
        assert_eq!(IMAGE[0x410..0x418], [0, 0, 0x20, 0, 0, 0, 0, 0], "the parameters have moved in rom.S");
        assert_eq!(IMAGE[0x418..0x420], [0, 0, 0, 0, 1, 0, 0, 0], "the parameters have moved in rom.S");
    }

    #[test]
    fn memory_parameters_are_kept_sane() {
        let image = image(Parameters { first: 0, last: 0, ..Parameters::default() });
        assert_eq!(image[0x40c..0x414], [0, 0, 0x10, 0, 0, 0x10, 0x10, 0]);
    }

    #[test]
    fn lines_are_read_and_noise_is_not() {
        assert_eq!(
            Line::parse("console: beat 0000002a 00000001 00000002 00000000\n"),
            Some(Line::Beat { token: 42, count: 1, pass: 2, errors: 0 })
        );
        assert_eq!(Line::parse("X 00101000"), Some(Line::Corrupt { address: 0x10_1000 }));
        assert_eq!(Line::parse("beat 2a 1"), None);
        assert_eq!(Line::parse("beat 0000002a 0000"), None);
    }

    #[test]
    fn frames_are_read_and_others_are_not() {
        let mut bytes = vec![0xff; 6];
        bytes.extend([2, 0, 0, 0, 0, 7, 0x88, 0xb5]);
        bytes.extend(b"beat");
        bytes.extend([1, 0, 0, 0, 0x10, 1, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0]);
        bytes.resize(60, 0);
        let frame = Frame { mac: [2, 0, 0, 0, 0, 7], token: 1, count: 0x110, errors: 0, writes: 9 };
        assert_eq!(Frame::parse(&bytes), Some(frame));
        for length in 0..34 {
            assert_eq!(Frame::parse(&bytes[..length]), None);
        }
        bytes[14] = b'B';
        assert_eq!(Frame::parse(&bytes), None);
    }

    #[test]
    fn the_story_notices_a_restart_a_step_back_and_corruption() {
        let tell = |lines: &[&str]| {
            let mut story = Story::default();
            lines.iter().for_each(|l| story.hear(l));
            story.complaint().map(str::to_owned)
        };
        let (start, one, two) =
            ("start 00000001", "beat 00000001 00000001 00000000 00000000", "beat 00000001 00000002 00000000 00000000");
        assert_eq!(tell(&[start, one, two]), None);
        assert!(tell(&[start, one, start]).unwrap().contains("started again"));
        assert!(tell(&[start, two, one]).unwrap().contains("went back"));
        assert!(tell(&[start, one, one]).unwrap().contains("went back"));
        assert!(tell(&[start, "X 00100000"]).unwrap().contains("corrupted"));
        assert!(tell(&[start, "D 00000003"]).unwrap().contains("disk is corrupted"));
    }
}
