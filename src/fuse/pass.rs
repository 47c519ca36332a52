//! Passing descriptors over unix sockets.
//! Invariant: a message that carries a descriptor is one byte long and is read by nobody but [`receive_fd`], because
//! an ordinary read of it would lose the descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Room for the control message that carries one descriptor, in bytes.
const ROOM: usize = 64;

/// Receives one descriptor that the peer passes with a message.
pub fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut control = [0u64; ROOM / 8]; // u64 for the alignment that cmsghdr wants
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = ROOM;
    // SAFETY: `message` points to buffers that live until the end of this function, with their true lengths.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled in msg_controllen; CMSG_FIRSTHDR gives null or a header within `control`.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if n == 0 || header.is_null() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it handed over no connection"));
    }
    // SAFETY: `header` is not null and lies within `control`, aligned as CMSG_FIRSTHDR promises.
    let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
    if level != libc::SOL_SOCKET || kind != libc::SCM_RIGHTS || len != one_fd() as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its message is not a connection"));
    }
    // SAFETY: an SCM_RIGHTS message of this length holds exactly one descriptor, which is now ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<RawFd>())) })
}

/// Passes `fd` to the peer, which gets a descriptor of its own for the same open file.
pub fn send_fd(socket: &UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0u8; 1];
    let mut control = [0u64; ROOM / 8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE only computes.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
    // SAFETY: `control` is aligned and large enough for one header with one descriptor, so the header is not null and
    // its data lies within `control`.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = one_fd() as usize;
        std::ptr::write_unaligned(libc::CMSG_DATA(header).cast::<RawFd>(), fd.as_raw_fd());
    }
    // SAFETY: `message` points to buffers that live until the end of this function, with their true lengths.
    match unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) } {
        1 => Ok(()),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn one_fd() -> u32 {
    // SAFETY: CMSG_LEN only computes.
    unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_passed_descriptor_arrives_and_its_absence_is_an_error() {
        let (a, b) = UnixStream::pair().expect("pair");
        let (mut reader, writer) = io::pipe().expect("pipe");
        send_fd(&a, writer.as_fd()).expect("sent");
        drop(writer);
        let mut passed = std::fs::File::from(receive_fd(&b).expect("received"));
        passed.write_all(b"through").expect("written");
        drop(passed);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "through");
        drop(a);
        assert!(receive_fd(&b).is_err());
    }
}
