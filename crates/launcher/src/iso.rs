//! A small writer of CD images: ISO 9660 (ECMA-119) with Joliet names, one folder, the same bytes for the same files.
//!
//! cloud-init, ConfigMap and Secret volumes are such disks. Source and target of a migration make them each for themselves, so
//! nothing in them may depend on where or when they are made: all times are zero.

const SECTOR: usize = 2048;
/// A directory record is at most 255 bytes; 33 of them are fixed and a Joliet letter takes two.
const LONGEST_NAME: usize = 110;
/// Two volume descriptors and the terminator follow the 16 reserved sectors.
const FIRST_FREE: usize = 19;

/// Why an image cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file name does not fit.
    #[error("the file name {0:?} cannot be put on a disk: at most 110 letters, none of / \\ : ; * ?")]
    Name(String),
    /// Too much content.
    #[error("the files are {0} bytes, more than the 1 GiB that such a disk may have")]
    TooLarge(u64),
}

/// An image with this label and these files, in the order of their names.
pub fn image(label: &str, files: &[(String, Vec<u8>)]) -> Result<Vec<u8>, Error> {
    let mut files: Vec<(&str, &[u8])> = files.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
    files.sort();
    for (name, _) in &files {
        let bad = name.is_empty()
            || name.encode_utf16().count() > LONGEST_NAME
            || name.chars().any(|c| c.is_control() || "/\\:;*?".contains(c));
        if bad {
            return Err(Error::Name((*name).into()));
        }
    }
    let size: u64 = files.iter().map(|(_, c)| c.len() as u64).sum();
    if size > 1 << 30 {
        return Err(Error::TooLarge(size));
    }

    // Where everything is: path tables, the two folders, then the files.
    let plain_names: Vec<Vec<u8>> = (0..files.len()).map(|n| format!("F{n:07}.;1").into_bytes()).collect();
    let joliet_names: Vec<Vec<u8>> = files.iter().map(|(name, _)| utf16(name)).collect();
    let tables = [FIRST_FREE, FIRST_FREE + 1, FIRST_FREE + 2, FIRST_FREE + 3];
    let plain_folder = FIRST_FREE + 4;
    let plain_size = folder_size(&plain_names);
    let joliet_folder = plain_folder + plain_size / SECTOR;
    let joliet_size = folder_size(&joliet_names);
    let mut at = joliet_folder + joliet_size / SECTOR;
    let mut extents = Vec::new();
    for (_, content) in &files {
        extents.push((at, content.len()));
        at += content.len().div_ceil(SECTOR);
    }
    let sectors = at;

    let mut image = vec![0u8; 16 * SECTOR];
    image.extend(descriptor(1, label, sectors, [tables[0], tables[1]], (plain_folder, plain_size)));
    image.extend(descriptor(2, label, sectors, [tables[2], tables[3]], (joliet_folder, joliet_size)));
    image.extend(sector(&[255, b'C', b'D', b'0', b'0', b'1', 1]));
    for folder in [plain_folder, joliet_folder] {
        image.extend(sector(&[&[1, 0], &le(folder)[..], &[1, 0, 0, 0]].concat()));
        image.extend(sector(&[&[1, 0], &be(folder)[..], &[0, 1, 0, 0]].concat()));
    }
    image.extend(folder((plain_folder, plain_size), &plain_names, &extents));
    image.extend(folder((joliet_folder, joliet_size), &joliet_names, &extents));
    for (_, content) in &files {
        image.extend_from_slice(content);
        image.resize(image.len().next_multiple_of(SECTOR), 0);
    }
    Ok(image)
}

fn le(n: usize) -> [u8; 4] {
    (n as u32).to_le_bytes()
}

fn be(n: usize) -> [u8; 4] {
    (n as u32).to_be_bytes()
}

/// A number in both byte orders, as ECMA-119 7.3.3 has it.
fn both(n: usize) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&le(n));
    bytes[4..].copy_from_slice(&be(n));
    bytes
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

fn sector(bytes: &[u8]) -> Vec<u8> {
    let mut sector = bytes.to_vec();
    sector.resize(SECTOR, 0);
    sector
}

/// A volume descriptor: 1 is the primary, 2 the supplementary one with Joliet names.
fn descriptor(kind: u8, label: &str, sectors: usize, tables: [usize; 2], root: (usize, usize)) -> Vec<u8> {
    let joliet = kind == 2;
    // Texts are filled up with blanks, of two bytes in Joliet; a field of odd length ends with a zero byte then.
    let text = |text: &str, length: usize| {
        let mut bytes = if joliet { utf16(text) } else { text.as_bytes().to_vec() };
        bytes.truncate(length & !usize::from(joliet));
        while bytes.len() < length {
            match (joliet, length - bytes.len()) {
                (true, 1) => bytes.push(0),
                (true, _) => bytes.extend([0, b' ']),
                (false, _) => bytes.push(b' '),
            }
        }
        bytes
    };
    let mut d = vec![kind];
    d.extend(b"CD001\x01\x00");
    d.extend(text("", 32)); // system
    d.extend(text(label, 32));
    d.extend([0; 8]);
    d.extend(both(sectors));
    let mut escapes = [0u8; 32];
    if joliet {
        escapes[..3].copy_from_slice(b"%/E"); // UCS-2 level 3
    }
    d.extend(escapes);
    d.extend([1, 0, 0, 1]); // one volume
    d.extend([1, 0, 0, 1]); // the first
    d.extend([0, 8, 8, 0]); // sectors of 2048 bytes
    d.extend(both(10)); // bytes of a path table
    d.extend(le(tables[0]));
    d.extend([0; 4]);
    d.extend(be(tables[1]));
    d.extend([0; 4]);
    d.extend(record(root, true, &[0]));
    for length in [128, 128, 128, 128, 37, 37, 37] {
        d.extend(text("", length));
    }
    for _ in 0..4 {
        d.extend([b'0'; 16]); // a time that is not given
        d.push(0);
    }
    d.extend([1, 0]);
    sector(&d)
}

/// A directory record (ECMA-119 9.1).
fn record((at, size): (usize, usize), is_folder: bool, name: &[u8]) -> Vec<u8> {
    let length = 33 + name.len() + (name.len() + 1) % 2;
    let mut r = vec![length as u8, 0];
    r.extend(both(at));
    r.extend(both(size));
    r.extend([70, 1, 1, 0, 0, 0, 0]); // 1970-01-01
    r.extend([if is_folder { 2 } else { 0 }, 0, 0, 1, 0, 0, 1, name.len() as u8]);
    r.extend(name);
    r.resize(length, 0);
    r
}

/// Calls `put` with the length of each record and whether it begins a sector: records do not cross sectors.
fn folder_size(names: &[Vec<u8>]) -> usize {
    let lengths = names.iter().map(|n| 33 + n.len() + (n.len() + 1) % 2);
    let mut size: usize = 34 + 34;
    for length in lengths {
        if size % SECTOR + length > SECTOR {
            size = size.next_multiple_of(SECTOR);
        }
        size += length;
    }
    size.next_multiple_of(SECTOR)
}

fn folder(own: (usize, usize), names: &[Vec<u8>], extents: &[(usize, usize)]) -> Vec<u8> {
    let mut bytes = record(own, true, &[0]);
    bytes.extend(record(own, true, &[1]));
    for (name, extent) in names.iter().zip(extents) {
        let record = record(*extent, false, name);
        if bytes.len() % SECTOR + record.len() > SECTOR {
            bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        }
        bytes.extend(record);
    }
    bytes.resize(own.1, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the Joliet side back, as an operating system would.
    fn read(image: &[u8]) -> (String, Vec<(String, Vec<u8>)>) {
        let text = |b: &[u8]| {
            let units: Vec<u16> = b.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]])).collect();
            String::from_utf16(&units).unwrap().trim_end().to_string()
        };
        let number = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize;
        let volume = &image[17 * SECTOR..18 * SECTOR];
        assert_eq!(&volume[..7], b"\x02CD001\x01");
        assert_eq!(number(&volume[80..]) * SECTOR, image.len());
        let root = &volume[156..190];
        let (at, size) = (number(&root[2..]) * SECTOR, number(&root[10..]));
        let (mut files, mut p) = (Vec::new(), at);
        while p < at + size {
            let length = image[p] as usize;
            if length == 0 {
                p = (p + 1).next_multiple_of(SECTOR);
                continue;
            }
            let r = &image[p..p + length];
            if r[25] == 0 {
                let (from, bytes) = (number(&r[2..]) * SECTOR, number(&r[10..]));
                files.push((text(&r[33..33 + r[32] as usize]), image[from..from + bytes].to_vec()));
            }
            p += length;
        }
        (text(&volume[40..72]), files)
    }

    #[test]
    fn files_come_back_as_they_were() {
        let files = vec![
            ("user-data".to_string(), b"#cloud-config\n".to_vec()),
            ("meta-data".to_string(), vec![7u8; 5000]),
            ("empty".to_string(), Vec::new()),
        ];
        let image = image("cidata", &files).unwrap();
        let (label, mut back) = read(&image);
        assert_eq!(label, "cidata");
        let mut files = files;
        files.sort();
        back.sort();
        assert_eq!(back, files);
    }

    #[test]
    fn many_files_take_more_than_a_sector_of_records() {
        let files: Vec<_> = (0..100).map(|n| (format!("a-rather-long-file-name-{n:03}.conf"), vec![n as u8])).collect();
        assert_eq!(read(&image("cfgdata", &files).unwrap()).1, files);
    }

    #[test]
    fn the_same_files_give_the_same_bytes_in_any_order() {
        let (a, b) = (("a".to_string(), vec![1]), ("b".to_string(), vec![2]));
        assert_eq!(image("x", &[a.clone(), b.clone()]), image("x", &[b, a]));
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        for name in ["", "a/b", &"x".repeat(111)] {
            assert_eq!(image("x", &[(name.to_string(), vec![])]), Err(Error::Name(name.to_string())));
        }
    }
}
